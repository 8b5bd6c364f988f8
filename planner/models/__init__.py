"""Models: shapes, the catalog, configs of the Hub, inspectors of unknown ones."""
