//! The bus: which function an access belongs to, and whether the access is well-formed.

use super::{CONFIG_SPACE_SIZE, Function, HostBridge};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Device numbers on a bus (PCI 3.0, 3.2.2.3.2).
const DEVICES: usize = 32;

/// CONFIG_ADDRESS (PCI 3.0, 3.2.2.3.2): a 32-bit register; narrower accesses are not its.
const CONFIG_ADDRESS: u16 = 0xCF8;
/// CONFIG_DATA, four byte lanes.
const CONFIG_DATA: u16 = 0xCFC;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function and register number; the rest is hard-wired to zero.
const ADDRESS_WRITABLE: u32 = 0x80FF_FFFC;

/// A slot has a function already, or there is no such slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("PCI slot {0} is taken or does not exist: slots are 1 to 31, one device each")]
pub struct SlotTaken(pub u8);

type Functions = [Option<Arc<dyn Function>>; DEVICES];

/// PCI segment 0, bus 0, shared among the vCPUs. Functions are reached under the lock, and [`PciBus::remove`] waits
/// for it: no vCPU, which may close nothing, is ever the last to have one.
pub struct PciBus {
    bridge: Arc<HostBridge>,
    functions: RwLock<Functions>,
    address: AtomicU32,
}

impl PciBus {
    /// A bus with its host bridge at device 0, which has a register for an exit status where it `takes_status`.
    #[must_use]
    pub fn new(takes_status: bool) -> Self {
        let bridge = Arc::new(HostBridge::new(takes_status));
        let mut functions: Functions = [const { None }; DEVICES];
        functions[0] = Some(Arc::clone(&bridge) as Arc<dyn Function>);
        Self {
            bridge,
            functions: RwLock::new(functions),
            address: AtomicU32::new(0),
        }
    }

    /// Puts a function at device `slot`, function 0.
    ///
    /// # Errors
    /// [`SlotTaken`].
    pub fn add(&self, slot: u8, function: Arc<dyn Function>) -> Result<(), SlotTaken> {
        match self.functions_mut().get_mut(usize::from(slot)) {
            Some(place @ None) => {
                *place = Some(function);
                Ok(())
            }
            _ => Err(SlotTaken(slot)),
        }
    }

    /// Takes the function out of device `slot`, where there is one that is no bridge. No vCPU is in it any more.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn Function>> {
        let place = usize::from(slot);
        (place > 0).then(|| self.functions_mut().get_mut(place)?.take())?
    }

    fn functions(&self) -> RwLockReadGuard<'_, Functions> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn functions_mut(&self) -> RwLockWriteGuard<'_, Functions> {
        self.functions.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of an I/O port. False: the port is not the bus's, `data` is untouched.
    pub fn io_read(&self, port: u16, data: &mut [u8]) -> bool {
        match port {
            CONFIG_ADDRESS if data.len() == 4 => {
                data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            }
            CONFIG_ADDRESS..CONFIG_DATA => data.fill(0xFF),
            CONFIG_DATA..=0xCFF => match self.selected(&self.functions(), port, data.len()) {
                Some((function, offset)) => function.config_read(offset, data),
                None => data.fill(0xFF),
            },
            _ => return false,
        }
        true
    }

    /// A write to an I/O port. False: the port is not the bus's.
    pub fn io_write(&self, port: u16, data: &[u8]) -> bool {
        match port {
            CONFIG_ADDRESS => {
                if let Ok(value) = <[u8; 4]>::try_from(data) {
                    self.address
                        .store(u32::from_le_bytes(value) & ADDRESS_WRITABLE, Ordering::Relaxed);
                }
            }
            0xCF9..CONFIG_DATA => {}
            CONFIG_DATA..=0xCFF => {
                if let Some((function, offset)) = self.selected(&self.functions(), port, data.len()) {
                    function.config_write(offset, data);
                }
            }
            _ => return false,
        }
        true
    }

    /// A read of the enhanced configuration space, `offset` bytes into it.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        match enhanced(&self.functions(), offset, data.len()) {
            Some((function, register)) => function.config_read(register, data),
            None => data.fill(0xFF),
        }
    }

    /// A write to the enhanced configuration space.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = enhanced(&self.functions(), offset, data.len()) {
            function.config_write(register, data);
        }
    }

    /// The exit status that was written since the last look: to be asked for after each write to a
    /// configuration space.
    pub fn take_status(&self) -> Option<u8> {
        self.bridge.take_status()
    }

    /// A read of guest physical address `gpa`. False: no BAR is decoded there.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let functions = self.functions();
        let Some((function, offset, size)) = decode(&functions, gpa) else {
            return false;
        };
        if fits(offset, data.len(), size) {
            function.bar_read(offset, data);
        } else {
            data.fill(0xFF);
        }
        true
    }

    /// A write to guest physical address `gpa`. False: no BAR is decoded there.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let functions = self.functions();
        let Some((function, offset, size)) = decode(&functions, gpa) else {
            return false;
        };
        if fits(offset, data.len(), size) {
            function.bar_write(offset, data);
        }
        true
    }

    /// Brings every function back to power-on, devices drained. Call it with no vCPU running and
    /// never from a vCPU thread: it waits for back ends, all of them at once, up to their drain
    /// deadline.
    pub fn reset(&self) {
        self.begin_reset();
        self.finish_reset();
    }

    /// The first half of [`PciBus::reset`], which waits for nobody.
    pub fn begin_reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        for function in self.functions().iter().flatten() {
            function.begin_reset();
        }
    }

    /// The second half of [`PciBus::reset`].
    pub fn finish_reset(&self) {
        // No lock meanwhile: it waits for back ends.
        let functions = self.functions().clone();
        for function in functions.iter().flatten() {
            function.finish_reset();
        }
    }

    fn selected<'f>(
        &self,
        functions: &'f Functions,
        port: u16,
        length: usize,
    ) -> Option<(&'f dyn Function, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let lane = port & 3;
        // An access that leaves the four byte lanes is the next port's, which is nobody's.
        if address & ADDRESS_ENABLE == 0 || usize::from(lane) + length > 4 {
            return None;
        }
        let bus = address >> 16 & 0xFF;
        let [low, high, ..] = address.to_le_bytes();
        if bus != 0 || high & 7 != 0 {
            return None;
        }
        let function = functions.get(usize::from(high >> 3))?.as_deref()?;
        Some((function, u16::from(low & 0xFC) | lane))
    }
}

fn enhanced(functions: &Functions, offset: u64, length: usize) -> Option<(&dyn Function, u16)> {
    let device = usize::try_from(offset >> 15).ok()?;
    let register = u16::try_from(offset & 0xFFF).ok()?;
    // Bits 12 to 14 are the function number: only function 0 exists.
    if offset >> 12 & 7 != 0 || !fits(register.into(), length, CONFIG_SPACE_SIZE.into()) {
        return None;
    }
    Some((functions.get(device)?.as_deref()?, register))
}

/// The function whose BAR `gpa` lies in, how far, and how large that is.
fn decode(functions: &Functions, gpa: u64) -> Option<(&dyn Function, u64, u64)> {
    functions.iter().flatten().find_map(|function| {
        let window = function.window()?;
        Some((&**function, window.offset_of(gpa)?, window.size))
    })
}

fn fits(offset: u64, length: usize, size: u64) -> bool {
    u64::try_from(length).is_ok_and(|length| length <= size - offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
    use std::time::Duration;

    /// Says that a vCPU reads it, which takes until it is let.
    struct Slow {
        entered: Sender<()>,
        leave: Mutex<Receiver<()>>,
    }

    impl Function for Slow {
        fn config_read(&self, _offset: u16, _data: &mut [u8]) {
            self.entered.send(()).unwrap();
            self.leave.lock().unwrap().recv().unwrap();
        }

        fn config_write(&self, _offset: u16, _data: &[u8]) {}
    }

    #[test]
    fn no_vcpu_is_the_last_to_have_a_function() {
        const LONG: Duration = Duration::from_secs(10);
        let bus = Arc::new(PciBus::new(false));
        let (entered, is_in) = channel();
        let (let_go, leave) = channel();
        let leave = Mutex::new(leave);
        bus.add(5, Arc::new(Slow { entered, leave })).unwrap();
        let reader = bus.clone();
        std::thread::spawn(move || reader.ecam_read(5 << 15, &mut [0; 4]));
        is_in.recv_timeout(LONG).unwrap();
        let (tell, told) = channel();
        std::thread::spawn(move || tell.send(bus.remove(5)).unwrap());
        let early = told.recv_timeout(Duration::from_millis(50));
        assert!(matches!(early, Err(RecvTimeoutError::Timeout)), "a vCPU is in it");
        let_go.send(()).unwrap();
        let function = told.recv_timeout(LONG).unwrap().unwrap();
        assert_eq!(Arc::strong_count(&function), 1);
    }

    fn probe(bus: &PciBus, address: u32, port: u16, width: usize) -> Vec<u8> {
        assert!(bus.io_write(0xCF8, &address.to_le_bytes()));
        let mut data = vec![0x55; width];
        assert!(bus.io_read(port, &mut data));
        data
    }

    #[test]
    fn linux_type_1_probe_succeeds() {
        let bus = PciBus::new(false);
        assert!(bus.io_write(0xCFB, &[1]));
        assert!(bus.io_write(0xCF8, &0x8000_0000u32.to_le_bytes()));
        let mut address = [0; 4];
        assert!(bus.io_read(0xCF8, &mut address));
        assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
        assert_eq!(
            probe(&bus, 0x8000_0008, 0xCFE, 2),
            [0x00, 0x06],
            "class is host bridge"
        );
    }

    #[test]
    fn lanes_and_absent_functions() {
        let bus = PciBus::new(false);
        assert_eq!(probe(&bus, 0x8000_0000, 0xCFC, 4), [0x36, 0x1B, 0x08, 0x00]);
        assert_eq!(probe(&bus, 0x8000_0000, 0xCFD, 2), [0x1B, 0x08]);
        assert_eq!(
            probe(&bus, 0x8000_0000, 0xCFF, 2),
            [0xFF, 0xFF],
            "crosses the last lane"
        );
        assert_eq!(probe(&bus, 0x0000_0000, 0xCFC, 2), [0xFF, 0xFF], "not enabled");
        assert_eq!(probe(&bus, 0x8000_0800, 0xCFC, 2), [0xFF, 0xFF], "no device 1");
        assert_eq!(probe(&bus, 0x8000_0100, 0xCFC, 2), [0xFF, 0xFF], "no function 1");
        assert_eq!(probe(&bus, 0x8001_0000, 0xCFC, 2), [0xFF, 0xFF], "no bus 1");
        assert!(!bus.io_read(0xD00, &mut [0]));
        assert!(!bus.io_write(0xCF7, &[0]));
    }

    #[test]
    fn ecam_has_bounds() {
        let bus = PciBus::new(false);
        let mut data = [0; 4];
        bus.ecam_read(0, &mut data);
        assert_eq!(data, [0x36, 0x1B, 0x08, 0x00]);
        let mut wide = [0; 8];
        bus.ecam_read(0, &mut wide);
        assert_eq!(wide[..4], data);
        for offset in [0xFFD, 1 << 12, 1 << 15, 1 << 20, u64::MAX] {
            bus.ecam_read(offset, &mut data);
            assert_eq!(data, [0xFF; 4], "{offset:#x}");
            bus.ecam_write(offset, &data);
        }
    }

    #[test]
    fn a_slot_is_given_once() {
        let bus = PciBus::new(false);
        let function = Arc::new(HostBridge::new(false));
        assert_eq!(bus.add(0, function.clone()), Err(SlotTaken(0)));
        assert_eq!(bus.add(32, function.clone()), Err(SlotTaken(32)));
        assert_eq!(bus.add(31, function.clone()), Ok(()));
        assert_eq!(bus.add(31, function.clone()), Err(SlotTaken(31)));
        assert!(bus.remove(31).is_some() && bus.remove(31).is_none());
        assert!(
            bus.remove(0).is_none() && bus.remove(32).is_none(),
            "no bridge, no slot"
        );
        let mut vendor = [0; 2];
        bus.ecam_read(31 << 15, &mut vendor);
        assert_eq!(vendor, [0xFF; 2], "nobody is there");
        assert_eq!(bus.add(31, function), Ok(()));
    }
}
