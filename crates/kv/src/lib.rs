//! SparseServe: kv.
