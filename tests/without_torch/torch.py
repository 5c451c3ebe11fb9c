"""Stands in for torch where a test starts an interpreter that does not need it: tvm_ffi would spend two seconds importing it."""

raise ModuleNotFoundError("No module named 'torch'", name="torch")
