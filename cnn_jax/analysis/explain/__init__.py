"""The lecture's arithmetic, on numbers small enough to follow: ./launch.sh explain."""
