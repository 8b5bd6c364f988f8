"""The parts of a decoder layer, each as operations on a tape."""
