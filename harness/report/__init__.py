"""One page that tells where the project stands: opens from disk, offline, on a phone and in print."""
