"""Several processes: who starts them, how they find each other, and what they exchange."""
