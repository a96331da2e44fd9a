"""What a stage trains: settings, tasks, the strategy, the one training loop and its data."""
