"""What data_prep, model and train share: errors and exit codes, config loading, atomic files."""
