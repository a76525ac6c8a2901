"""1:1 bindings to the kernel, under the kernel's own names. No policy here; runs in target, supervisor and zygote."""
