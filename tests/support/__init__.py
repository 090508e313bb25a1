"""What tests share: small datasets, and real processes."""
