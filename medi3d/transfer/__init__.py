"""Where bundles that were exported before version 0.2 look for their loader. Nothing else lives here."""
