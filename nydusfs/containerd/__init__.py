"""containerd as a client sees it: its own gRPC services as few typed calls, for `nydusify commit` and `ctr-remote`.

The only room below the snapshotter that speaks gRPC.
"""
