//! SparseServe: model.
