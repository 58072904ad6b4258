"""Event-loop plumbing: streams with an owner, the sync bridge, per-loop resources."""
