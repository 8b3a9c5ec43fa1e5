"""What a step costs on a TPU, told by the compiler without one."""
