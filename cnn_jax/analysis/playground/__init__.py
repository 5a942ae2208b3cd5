"""A trained network as one HTML page, in which a reader draws, looks inside, and asks.

The page computes everything with the network's own weights. It opens from a disk, without a server and
without a network.
"""
