//! SparseServe: ops-cpu.
