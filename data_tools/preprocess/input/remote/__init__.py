"""Remote input files of the data tools: s3://, hf:// and https:// through fsspec."""
