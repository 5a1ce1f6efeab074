"""From a device to a database that makes builds faster; docs/tuning.md.

decisions (schedules/)  what a rule leaves open       tasks       the kernels of a model, each kind once
candidates              a point and its schedule      search      which to measure next
worker, measure         compiling and timing          confirm     the pick against the default, in turn
database                what was measured, on disk    api         `horq_tvm.tune`
"""
