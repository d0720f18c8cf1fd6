//! The third queue of a device with several pairs: what it is follows from the driver's features.

use crate::control::ControlQueue;
use crate::rx::ReceiveQueue;
use std::os::fd::BorrowedFd;
use vhost_daemon::{QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

/// The second pair's receive queue; for a driver that takes no more than one pair, the control queue,
/// which follows that pair (virtio 1.3, 5.1.2).
pub struct ThirdQueue {
    receive: ReceiveQueue,
    control: ControlQueue,
    controls: bool,
}

impl ThirdQueue {
    /// Either of these.
    #[must_use]
    pub fn new(receive: ReceiveQueue, control: ControlQueue) -> Self {
        Self {
            receive,
            control,
            controls: false,
        }
    }

    fn used(&mut self) -> &mut dyn QueueHandler {
        if self.controls {
            &mut self.control
        } else {
            &mut self.receive
        }
    }
}

impl QueueHandler for ThirdQueue {
    fn start(&mut self, features: u64) {
        let has = |feature: u32| features & (1 << feature) != 0;
        self.controls = has(VIRTIO_NET_F_CTRL_VQ) && !has(VIRTIO_NET_F_MQ);
        self.used().start(features);
    }

    fn resume(&mut self, index: u16) {
        self.used().resume(index);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        if self.controls {
            self.control.source()
        } else {
            self.receive.source()
        }
    }

    fn is_ready(&mut self) -> bool {
        self.used().is_ready()
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        self.used().process(ring)
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.used().drain(ring)
    }
}
