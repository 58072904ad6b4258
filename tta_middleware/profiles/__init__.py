"""What was measured per model: the quality gate's bounds."""
