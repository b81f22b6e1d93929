//! The memory controller, pure.
