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
const BUFFER: usize = 2048;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const RECEIVE_BUFFERS: u16 = 128;

/// A NIC; buffer `n` of each queue is descriptor `n`.
struct Nic {
    queues: [Queue; 2],
    received: &'static mut [u8],
    sent: &'static mut [u8],
    sending: [bool; 256],
    mac: [u8; 6],
}

impl Nic {
    fn new(parameters: Parameters<'_>) -> Result<Self, Failure> {
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
        let size = usize::from(self.queues[TRANSMIT].size());
        let free = self.sending[..size].iter().position(|busy| !busy);
        let index = free.ok_or("the device keeps every transmit buffer")?;
        self.sending[index] = true;
        let mut frame = [0; FRAME_LENGTH];
        write_frame(&mut frame, [0xFF; 6], self.mac, GUEST_FRAMES, number);
        let buffer = &mut self.sent[index * BUFFER..(index + 1) * BUFFER];
        buffer[..HEADER].fill(0);
        buffer[HEADER..HEADER + FRAME_LENGTH].copy_from_slice(&frame);
        let place = (buffer.as_ptr() as u64, (HEADER + FRAME_LENGTH) as u32);
        self.queues[TRANSMIT].describe(index as u16, place, 0, 0);
        self.queues[TRANSMIT].submit(index as u16);
        Ok(pattern_checksum(&frame))
    }

    fn reclaim(&mut self) {
        while let Some((index, _)) = self.queues[TRANSMIT].pop() {
            if let Some(busy) = self.sending.get_mut(usize::from(index)) {
                *busy = false;
            }
        }
    }

    /// Takes one frame: its number and checksum, where it is the host's echo.
    fn receive(&mut self) -> Option<Option<(u64, u64)>> {
        let (index, length) = self.queues[RECEIVE].pop()?;
        let start = usize::from(index) * BUFFER;
        let frame = self
            .received
            .get(start + HEADER..(start + length as usize).min(start + BUFFER));
        let frame = frame.unwrap_or(&[]);
        let echo = frame_number(frame, HOST_FRAMES).map(|number| (number, pattern_checksum(frame)));
        self.queues[RECEIVE].submit(index);
        Some(echo)
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
