"""`python -m benchmarks.networks`: whole networks against ONNX Runtime, and where their time goes.

`subjects` has the networks, `arithmetic` what they have to compute, `engines` runs and times them in turn, `breakdown`
parts a network's time into classes, `report` makes records and tables of it.
"""
