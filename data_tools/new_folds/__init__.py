"""New fold files from folders of datasets, tables, or lists of Megatron-LM."""
