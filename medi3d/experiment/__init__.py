"""What a run is made of: settings, config, samples, strategies, and its folder."""
