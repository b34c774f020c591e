"""What a cache directory holds, for tools beside (or without) the nydusd it belongs to; for `nydusctl cache`.

Everything here only reads; changes are made through a `Holder`, which knows whether a process has the directory.
"""
