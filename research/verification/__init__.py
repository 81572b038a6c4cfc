"""`verify` and `torture`: the same training on every layout, its collectives counted, its types checked, its processes killed."""
