//! One rank of a group. A worker knows tensors and its rank; never a chat template.

pub mod backend;
pub mod checkpoint;
pub mod model;
pub mod registration;
