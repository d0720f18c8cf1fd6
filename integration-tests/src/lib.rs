//! Fixture library of the tests, the nested runner, and what the two commands are made of.

pub mod nested;

pub mod artifacts;
