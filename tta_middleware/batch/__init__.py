"""Files of prompts: what comes in, how it flows, how it is split."""
