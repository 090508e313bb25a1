"""Order of documents: shuffling and removal of duplicates, in bounded memory."""
