"""Other trainers as engines: started in the environment that they are installed in, told as our own is."""
