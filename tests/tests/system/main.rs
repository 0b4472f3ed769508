//! The system tests: one binary, because each starts real clusters and links the same client.

mod drafts;
mod drain;
mod failures;
mod first_light;
mod refusals;
mod registries;
mod requests;
mod sdk;
mod splits;
mod timeline;
mod traces;
