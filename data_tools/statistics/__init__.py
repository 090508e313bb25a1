"""Statistics of datasets: documents, tokens, bytes and document lengths, by source and language."""
