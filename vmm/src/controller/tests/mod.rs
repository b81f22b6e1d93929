//! Tests of the actor against a worker that is played by the test.
