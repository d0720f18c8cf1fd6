//! The control queue: how many pairs the driver uses (virtio 1.3, 5.1.6.5).
//!
//! Each command is a class, a command and its data, then one writable byte for the answer. What is
//! unknown, too short or out of range is answered by VIRTIO_NET_ERR.

use crate::steering::Steering;
use std::sync::Arc;
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Class, command, and the number of pairs.
const PAIRS_SET: usize = 4;

/// The control queue of a device with several pairs.
pub struct ControlQueue {
    steering: Arc<Steering>,
}

impl ControlQueue {
    /// A control queue over these pairs.
    #[must_use]
    pub fn new(steering: Arc<Steering>) -> Self {
        Self { steering }
    }

    fn execute(&self, chain: &Chain) -> u32 {
        let mut command = [0; PAIRS_SET];
        let length = chain.read_at(0, &mut command);
        match pairs_wanted(&command[..length]) {
            Some(pairs) if (1..=self.steering.pairs()).contains(&pairs) => {
                self.steering.set_active(pairs);
                VIRTIO_NET_OK
            }
            _ => VIRTIO_NET_ERR,
        }
    }
}

/// The pairs that a VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET asks for.
fn pairs_wanted(command: &[u8]) -> Option<usize> {
    let &[class, command, low, high] = command else {
        return None;
    };
    let ours =
        u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    ours.then(|| usize::from(u16::from_le_bytes([low, high])))
}

impl QueueHandler for ControlQueue {
    /// A driver starts with one pair and asks for more (virtio 1.3, 5.1.5).
    fn start(&mut self, _features: u64) {
        self.steering.set_active(1);
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        while let Some(chain) = ring.pop()? {
            if chain.writable_length() == 0 {
                return Err(RingFault::Request("a control command has no room for its answer"));
            }
            let answer = self.execute(&chain) as u8;
            chain.write_at(0, &[answer]);
            ring.complete(chain, 1);
        }
        Ok(Wait::AVAILABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_known_command_names_pairs() {
        assert_eq!(pairs_wanted(&[4, 0, 3, 0]), Some(3));
        assert_eq!(pairs_wanted(&[4, 0, 3]), None);
        assert_eq!(pairs_wanted(&[4, 1, 3, 0]), None);
        assert_eq!(pairs_wanted(&[1, 0, 3, 0]), None);
        assert_eq!(pairs_wanted(&[]), None);
    }
}
