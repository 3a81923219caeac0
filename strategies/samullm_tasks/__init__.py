"""What schedulers that search know of models before they place them: seconds, alone, in pairs."""
