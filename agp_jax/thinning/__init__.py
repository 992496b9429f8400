"""What a cut leaves: of trees, of optimizer states and of the functions they serve."""
