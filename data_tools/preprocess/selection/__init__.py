"""Selection of documents: hooks, limits, reasons for removal, and records of their order."""
