//! Frames (virtio 1.3, 5.1): the scenario `net`.

use crate::{
    cpu, memory,
    parameters::Parameters,
    pci::Function,
    queue::{Queue, WRITE, wait_any},
    scenario::{Failure, after_work, before_work},
    serial::line,
    virtio::{Device, EVENT_IDX},
};
use guest_contract::{
    Checksum, FRAME_LENGTH, FRAME_PATTERN, GUEST_FRAMES, HOST_FRAMES, frame_number, write_frame,
};

const NETWORK_DEVICE: u16 = 1;
const MAC_FEATURE: u64 = 1 << 5;
/// struct virtio_net_hdr_v1.
const HEADER: usize = 12;
pub(crate) const BUFFER: usize = 2048;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const RECEIVE_BUFFERS: u16 = 128;

/// A NIC; buffer `n` of each queue is descriptor `n`.
pub(crate) struct Nic {
    queues: [Queue; 2],
    received: &'static mut [u8],
    sent: &'static mut [u8],
    sending: [bool; 256],
    pub(crate) mac: [u8; 6],
}

impl Nic {
    pub(crate) fn new(parameters: Parameters<'_>) -> Result<Self, Failure> {
        let function = Function::find(NETWORK_DEVICE, parameters.number("nic", 0))?;
        let device = Device::new(function, MAC_FEATURE | EVENT_IDX)?;
        let mac = core::array::from_fn(|at| device.config.read8(at as u64));
        let mut queues = [device.queue(0, 256)?, device.queue(1, 256)?];
        let received = memory::pages(BUFFER * usize::from(RECEIVE_BUFFERS))?;
        let sent = memory::pages(BUFFER * 256)?;
        let buffers = RECEIVE_BUFFERS.min(queues[RECEIVE].size());
        for (index, buffer) in (0..buffers).zip(received.chunks_exact(BUFFER)) {
            queues[RECEIVE].describe(index, (buffer.as_ptr() as u64, BUFFER as u32), WRITE, 0);
            queues[RECEIVE].submit(index);
        }
        device.start();
        queues[RECEIVE].notify();
        Ok(Self {
            queues,
            received,
            sent,
            sending: [false; 256],
            mac,
        })
    }

    /// Sends test frame `number`; returns its pattern's checksum.
    fn send(&mut self, number: u64) -> Result<u64, Failure> {
        let mut frame = [0; FRAME_LENGTH];
        write_frame(&mut frame, [0xFF; 6], self.mac, GUEST_FRAMES, number);
        self.send_frame(&frame)?;
        Ok(pattern_checksum(&frame))
    }

    /// Sends a whole frame, which fits a buffer.
    pub(crate) fn send_frame(&mut self, frame: &[u8]) -> Result<(), Failure> {
        let size = usize::from(self.queues[TRANSMIT].size());
        let free = self.sending[..size].iter().position(|busy| !busy);
        let index = free.ok_or("the device keeps every transmit buffer")?;
        self.sending[index] = true;
        let buffer = &mut self.sent[index * BUFFER..(index + 1) * BUFFER];
        buffer[..HEADER].fill(0);
        buffer[HEADER..HEADER + frame.len()].copy_from_slice(frame);
        let place = (buffer.as_ptr() as u64, (HEADER + frame.len()) as u32);
        self.queues[TRANSMIT].describe(index as u16, place, 0, 0);
        self.queues[TRANSMIT].submit(index as u16);
        Ok(())
    }

    /// Tells the device of the frames sent, and waits for one to come.
    pub(crate) fn turn(&mut self) {
        self.queues[RECEIVE].notify();
        self.queues[TRANSMIT].notify();
        // Transmit completions are reclaimed when there is something to send: no interrupt.
        self.queues[TRANSMIT].disarm();
        wait_any(core::slice::from_mut(&mut self.queues[RECEIVE]));
        self.reclaim();
    }

    fn reclaim(&mut self) {
        while let Some((index, _)) = self.queues[TRANSMIT].pop() {
            if let Some(busy) = self.sending.get_mut(usize::from(index)) {
                *busy = false;
            }
        }
    }

    /// Waits until every frame was sent.
    pub(crate) fn flush(&mut self) {
        self.queues[TRANSMIT].notify();
        self.reclaim();
        while self.sending.contains(&true) {
            wait_any(core::slice::from_mut(&mut self.queues[TRANSMIT]));
            self.reclaim();
        }
    }

    /// Takes one frame: its number and checksum, where it is the host's echo.
    fn receive(&mut self) -> Option<Option<(u64, u64)>> {
        let mut bytes = [0; BUFFER];
        let length = self.receive_frame(&mut bytes)?;
        let frame = &bytes[..length];
        Some(frame_number(frame, HOST_FRAMES).map(|number| (number, pattern_checksum(frame))))
    }

    /// Takes one frame, of any kind, into `bytes`; its length.
    pub(crate) fn receive_frame(&mut self, bytes: &mut [u8; BUFFER]) -> Option<usize> {
        let (index, length) = self.queues[RECEIVE].pop()?;
        let start = usize::from(index) * BUFFER;
        let frame = self
            .received
            .get(start + HEADER..(start + length as usize).min(start + BUFFER));
        let frame = frame.unwrap_or(&[]);
        bytes[..frame.len()].copy_from_slice(frame);
        let length = frame.len();
        self.queues[RECEIVE].submit(index);
        Some(length)
    }
}

fn pattern_checksum(frame: &[u8]) -> u64 {
    let mut checksum = Checksum::default();
    checksum.update(&frame[FRAME_PATTERN..]);
    checksum.0
}

/// `net`: sends `packets` frames with up to `depth` unanswered, each of which the other side
/// echoes under its own seed.
pub(crate) fn scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let packets = parameters.number("packets", 10_000);
    let depth = parameters.number("depth", 32).clamp(1, 64);
    let mut nic = Nic::new(parameters)?;
    line!("mac={:02x?}", nic.mac);
    before_work(parameters);
    let start = cpu::time();
    let (mut sent, mut echoed, mut strangers) = (0, 0, 0_u64);
    let (mut sent_sum, mut echoed_sum, mut numbers) = (0_u64, 0_u64, 0_u64);
    while echoed < packets {
        nic.reclaim();
        while sent < packets && sent - echoed < depth {
            sent_sum = sent_sum.wrapping_add(nic.send(sent)?);
            sent += 1;
        }
        nic.queues[TRANSMIT].notify();
        // Transmit completions are reclaimed when there is something to send: no interrupt.
        nic.queues[TRANSMIT].disarm();
        wait_any(core::slice::from_mut(&mut nic.queues[RECEIVE]));
        while let Some(frame) = nic.receive() {
            match frame {
                Some((number, checksum)) => {
                    echoed += 1;
                    numbers = numbers.wrapping_add(number);
                    echoed_sum = echoed_sum.wrapping_add(checksum);
                }
                None => strangers += 1,
            }
        }
        nic.queues[RECEIVE].notify();
    }
    let cycles = cpu::time() - start;
    after_work(parameters);
    line!("cycles={cycles}");
    line!("sent={sent}");
    line!("echoed={echoed}");
    line!("strangers={strangers}");
    line!("sent_checksum={sent_sum:016x}");
    line!("echoed_checksum={echoed_sum:016x}");
    line!(
        "interrupts={}",
        nic.queues[RECEIVE].interrupts() + nic.queues[TRANSMIT].interrupts()
    );
    line!(
        "doorbells={}",
        nic.queues[RECEIVE].kicks + nic.queues[TRANSMIT].kicks
    );
    if numbers != packets * packets.saturating_sub(1) / 2 {
        return Err("a frame came twice or not at all");
    }
    Ok(())
}

/// `net-echo`: answers `packets` frames of another guest's scenario `net` as the host would.
pub(crate) fn echo_scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let packets = parameters.number("packets", 10_000);
    let mut nic = Nic::new(parameters)?;
    line!("ready=1");
    let (mut echoed, mut bytes) = (0, [0; BUFFER]);
    while echoed < packets {
        nic.turn();
        while let Some(length) = nic.receive_frame(&mut bytes) {
            let Some(number) = frame_number(&bytes[..length], GUEST_FRAMES) else {
                continue;
            };
            let mut to = [0; 6];
            to.copy_from_slice(&bytes[6..12]);
            let mut frame = [0; FRAME_LENGTH];
            write_frame(&mut frame, to, nic.mac, HOST_FRAMES, number);
            nic.send_frame(&frame)?;
            echoed += 1;
        }
    }
    // The last answers have left when the device says so.
    nic.flush();
    line!("echoed={echoed}");
    Ok(())
}
