"""Configuration of a run: schema, presets, command line, validation and warnings."""
