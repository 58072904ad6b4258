"""The packed pass: who decodes when, on which keys and values."""
