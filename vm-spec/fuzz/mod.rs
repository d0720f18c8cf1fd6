//! Fuzz targets: the messages between our processes.

use crate::control::{Envelope, FromVmm, ToVmm};
use crate::supervise::{FromSupervisor, SupervisorConfig, ToSupervisor};
use serde::{Serialize, de::DeserializeOwned};

/// Reads one datagram as each kind of message. What is accepted survives another journey.
pub fn control(input: &[u8]) {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    match kind % 5 {
        0 => travel::<ToVmm>(bytes),
        1 => travel::<FromVmm>(bytes),
        2 => travel::<ToSupervisor>(bytes),
        3 => travel::<FromSupervisor>(bytes),
        _ => travel::<SupervisorConfig>(bytes),
    }
}

fn travel<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(message) = Envelope::<T>::decode(bytes) {
        let again = message.encode().expect("what was read can be written");
        let back = Envelope::<T>::decode(&again).expect("what was written can be read");
        assert_eq!(back.encode().expect("it stays"), again);
    }
}
