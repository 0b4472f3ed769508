//! Groups as the request path sees them: what is ready (handle.rs) and the one stream to a lead
//! rank (stream.rs).

pub mod figures;
pub mod handle;
mod link;
pub mod stream;
