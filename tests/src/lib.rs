//! Where the fixtures are.
