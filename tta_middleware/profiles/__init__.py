"""What was measured per model: quality bounds, tuned settings."""
