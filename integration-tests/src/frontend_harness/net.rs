//! Frames (virtio 1.3, 5.1.6), with the 12-byte header of VERSION_1.

use super::{ring::Segment, session::Session};
use anyhow::{Context, Result, ensure};
use std::{collections::BTreeMap, time::Duration};

/// struct virtio_net_hdr_v1.
const HEADER: usize = 12;
const BUFFER: u64 = 4096;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A network driver over a [`Session`] with queues 0 (receive) and 1 (transmit).
#[derive(Debug)]
pub struct NetDriver {
    /// The session.
    pub session: Session,
    receiving: BTreeMap<u16, u64>,
    sending: BTreeMap<u16, u64>,
    free: Vec<u64>,
}

impl NetDriver {
    /// Fills the receive queue.
    ///
    /// # Errors
    /// When the session has fewer than two queues.
    pub fn new(session: Session) -> Result<Self> {
        ensure!(session.rings.len() >= 2, "a NIC has two queues");
        let start = session.data_start();
        let size = u64::from(session.rings[RECEIVE].size());
        let mut driver = Self {
            session,
            receiving: BTreeMap::new(),
            sending: BTreeMap::new(),
            free: (0..size).map(|slot| start + (size + slot) * BUFFER).collect(),
        };
        for slot in 0..size {
            driver.post(start + slot * BUFFER)?;
        }
        driver.session.rings[RECEIVE].notify()?;
        Ok(driver)
    }

    fn post(&mut self, address: u64) -> Result<()> {
        let buffer = Segment {
            address,
            length: BUFFER as u32,
            writable: true,
        };
        let head = self.session.rings[RECEIVE].push(&[buffer])?;
        self.receiving.insert(head, address);
        Ok(())
    }

    /// Sends one frame, and waits until the device has taken it.
    ///
    /// # Errors
    /// When the device does not before `deadline` has passed.
    pub fn send(&mut self, frame: &[u8], deadline: Duration) -> Result<()> {
        ensure!(
            frame.len() + HEADER <= BUFFER as usize,
            "frame of {} bytes",
            frame.len()
        );
        let address = self.free.pop().context("no transmit buffer left")?;
        self.session.memory.write(address, &[0; HEADER])?;
        self.session.memory.write(address + HEADER as u64, frame)?;
        let buffer = Segment {
            address,
            length: (frame.len() + HEADER) as u32,
            writable: false,
        };
        let ring = &mut self.session.rings[TRANSMIT];
        let head = ring.push(&[buffer])?;
        self.sending.insert(head, address);
        ring.notify()?;
        let (head, _) = ring.wait_used(deadline)?;
        self.free.extend(self.sending.remove(&head));
        Ok(())
    }

    /// The next frame.
    ///
    /// # Errors
    /// When none comes before `deadline` has passed, or it does not fit its buffer.
    pub fn receive(&mut self, deadline: Duration) -> Result<Vec<u8>> {
        let (head, length) = self.session.rings[RECEIVE].wait_used(deadline)?;
        let address = self
            .receiving
            .remove(&head)
            .context("no receive buffer has this head")?;
        let length = length as usize;
        ensure!(
            (HEADER..=BUFFER as usize).contains(&length),
            "used length {length}"
        );
        let frame = self
            .session
            .memory
            .read(address + HEADER as u64, length - HEADER)?;
        self.post(address)?;
        self.session.rings[RECEIVE].notify()?;
        Ok(frame)
    }
}
