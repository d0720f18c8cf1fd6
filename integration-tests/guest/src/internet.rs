//! Just enough of IPv4 to use what `user` offers: DHCP (RFC 2131), ARP, and UDP out and in.

use crate::{
    net::{BUFFER, Nic},
    parameters::Parameters,
    scenario::Failure,
    serial::line,
};

const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const UDP: u8 = 17;
const ETHERNET: usize = 14;
const IP: usize = 20;
/// Where a UDP datagram's payload starts in its frame.
const PAYLOAD: usize = ETHERNET + IP + 8;
/// Where DHCP options start in their datagram.
const OPTIONS: usize = 240;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
/// The port that this guest sends from, and the one that others find it at.
const OWN_PORT: u16 = 5000;
const PUBLISHED_PORT: u16 = 7;

type Address = [u8; 4];
const ANY: Address = [0; 4];
const EVERYONE: Address = [255; 4];

/// One end of a datagram.
#[derive(Clone, Copy)]
struct End {
    mac: [u8; 6],
    address: Address,
    port: u16,
}

/// What DHCP gave.
#[derive(Clone, Copy)]
struct Lease {
    address: Address,
    router: Address,
    dns: Address,
    server: Address,
}

struct Station {
    nic: Nic,
    address: Address,
    frame: [u8; BUFFER],
}

impl Station {
    fn send(&mut self, from: u16, to: End, payload: &[u8]) -> Result<(), Failure> {
        let mut frame = [0; BUFFER];
        let length = PAYLOAD + payload.len();
        frame[..6].copy_from_slice(&to.mac);
        frame[6..12].copy_from_slice(&self.nic.mac);
        frame[12..14].copy_from_slice(&TYPE_IPV4);
        let ip = &mut frame[ETHERNET..ETHERNET + IP];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((length - ETHERNET) as u16).to_be_bytes());
        (ip[8], ip[9]) = (64, UDP);
        ip[12..16].copy_from_slice(&self.address);
        ip[16..20].copy_from_slice(&to.address);
        let sum = checksum(ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        // No checksum of its own (RFC 768 allows that).
        let udp = &mut frame[ETHERNET + IP..PAYLOAD];
        udp[..2].copy_from_slice(&from.to_be_bytes());
        udp[2..4].copy_from_slice(&to.port.to_be_bytes());
        udp[4..6].copy_from_slice(&((length - ETHERNET - IP) as u16).to_be_bytes());
        frame[PAYLOAD..length].copy_from_slice(payload);
        self.nic.send_frame(&frame[..length])
    }

    /// Waits for a datagram to `port`, and answers ARP meanwhile. Its sender, and where its payload
    /// lies in `self.frame`.
    fn receive(&mut self, port: u16) -> Result<(End, usize), Failure> {
        loop {
            let Some(length) = self.nic.receive_frame(&mut self.frame) else {
                self.nic.turn();
                continue;
            };
            let frame = &self.frame[..length];
            if frame.len() >= 42 && frame[12..14] == TYPE_ARP && frame[38..42] == self.address {
                self.answer_arp()?;
                continue;
            }
            let ours = frame.len() > PAYLOAD
                && frame[12..14] == TYPE_IPV4
                && frame[ETHERNET + 9] == UDP
                && frame[ETHERNET + IP + 2..ETHERNET + IP + 4] == port.to_be_bytes();
            if ours {
                let mut mac = [0; 6];
                mac.copy_from_slice(&frame[6..12]);
                let from = End {
                    mac,
                    address: address_at(frame, ETHERNET + 12),
                    port: u16::from_be_bytes([frame[ETHERNET + IP], frame[ETHERNET + IP + 1]]),
                };
                return Ok((from, length));
            }
        }
    }

    fn answer_arp(&mut self) -> Result<(), Failure> {
        let mut answer = [0; 42];
        answer[..6].copy_from_slice(&self.frame[6..12]);
        answer[6..12].copy_from_slice(&self.nic.mac);
        answer[12..20].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4]);
        answer[21] = 2;
        answer[22..28].copy_from_slice(&self.nic.mac);
        answer[28..32].copy_from_slice(&self.address);
        answer[32..42].copy_from_slice(&self.frame[22..32]);
        self.nic.send_frame(&answer)
    }

    /// Sends a DHCP message of type `kind` and waits for one of type `wanted`.
    fn dhcp(&mut self, kind: u8, wanted: u8, lease: Option<Lease>) -> Result<(Lease, [u8; 6]), Failure> {
        let mut message = [0; 300];
        message[..4].copy_from_slice(&[1, 1, 6, 0]);
        message[4..8].copy_from_slice(b"bulk");
        message[28..34].copy_from_slice(&self.nic.mac);
        message[236..240].copy_from_slice(&[99, 130, 83, 99]);
        message[240..243].copy_from_slice(&[53, 1, kind]);
        let mut end = 243;
        if let Some(lease) = lease {
            message[243..245].copy_from_slice(&[50, 4]);
            message[245..249].copy_from_slice(&lease.address);
            message[249..251].copy_from_slice(&[54, 4]);
            message[251..255].copy_from_slice(&lease.server);
            end = 255;
        }
        message[end..end + 5].copy_from_slice(&[55, 2, 3, 6, 255]);
        let everyone = End {
            mac: [0xFF; 6],
            address: EVERYONE,
            port: 67,
        };
        self.send(68, everyone, &message)?;
        loop {
            let (from, length) = self.receive(68)?;
            let answer = &self.frame[PAYLOAD..length];
            if answer.len() > OPTIONS && option(answer, 53).first() == Some(&wanted) {
                let pick = |code| {
                    option(answer, code)
                        .get(..4)
                        .map_or(ANY, |value| address_at(value, 0))
                };
                let lease = Lease {
                    address: address_at(answer, 16),
                    router: pick(3),
                    dns: pick(6),
                    server: pick(54),
                };
                return Ok((lease, from.mac));
            }
        }
    }
}

fn address_at(bytes: &[u8], at: usize) -> Address {
    let mut address = ANY;
    address.copy_from_slice(&bytes[at..at + 4]);
    address
}

/// The value of a DHCP option; empty where it is not there.
fn option(message: &[u8], code: u8) -> &[u8] {
    let mut rest = &message[OPTIONS..];
    while let [found, length, tail @ ..] = rest {
        let length = usize::from(*length).min(tail.len());
        match *found {
            255 => break,
            0 => rest = &rest[1..],
            found if found == code => return &tail[..length],
            _ => rest = &tail[length..],
        }
    }
    &[]
}

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    !((folded + (folded >> 16)) as u16)
}

/// `net-user`: leases an address, asks port `peer` of the router for an echo, and echoes one
/// datagram that comes to its published port.
pub(crate) fn scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let peer = u16::try_from(parameters.number("peer", 0)).map_err(|_| "peer is no port")?;
    let mut station = Station {
        nic: Nic::new(parameters)?,
        address: ANY,
        frame: [0; BUFFER],
    };
    let (offer, _) = station.dhcp(DISCOVER, OFFER, None)?;
    let (lease, router) = station.dhcp(REQUEST, ACK, Some(offer))?;
    station.address = lease.address;
    line!("address={:?}", lease.address);
    line!("dns={:?}", lease.dns);
    let to = End {
        mac: router,
        address: lease.router,
        port: peer,
    };
    station.send(OWN_PORT, to, b"outbound")?;
    let (_, length) = station.receive(OWN_PORT)?;
    if &station.frame[PAYLOAD..length] != b"outbound" {
        return Err("another datagram came back");
    }
    line!("outbound=ok");
    line!("ready=1");
    let (from, length) = station.receive(PUBLISHED_PORT)?;
    let mut payload = [0; 64];
    let payload = &mut payload[..(length - PAYLOAD).min(64)];
    payload.copy_from_slice(&station.frame[PAYLOAD..PAYLOAD + payload.len()]);
    station.send(PUBLISHED_PORT, from, payload)?;
    station.nic.flush();
    line!("published=ok");
    Ok(())
}
