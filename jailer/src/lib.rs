//! The launcher, the spawner, the supervisor, and the jail itself.
//!
//! [`sandbox`] is all that the vmm and the device processes link; the rest belongs to the
//! `launcher` feature and to the short-lived launcher.

pub mod sandbox;
