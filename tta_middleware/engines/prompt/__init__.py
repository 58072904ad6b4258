"""From a conversation to embedding rows and back to text."""
