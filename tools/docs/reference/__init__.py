"""Reference of all fields, keys and flags, written from the schemas and parsers."""
