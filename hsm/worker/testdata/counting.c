// A PKCS#11 module for tests: SoftHSM2's, with some calls counted, and some
// answered with a CK_RV, each once.
//
// COUNT_DIR/calls gets a line for each call that is counted; with COUNT_SIGNS for each
// C_Sign too, with the first byte of what is signed. Where
// COUNT_DIR/NAME.rv exists, the next C_NAME takes it away and returns the number
// in it; 'crash' crashes, 'hang' hangs, 'wait' waits
// for COUNT_DIR/NAME.go. While COUNT_DIR/deadly exists, every C_Sign
// crashes that is over what begins with what is in it.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CK_PTR *
#define CK_DECLARE_FUNCTION(returnType, name) returnType name
#define CK_DECLARE_FUNCTION_POINTER(returnType, name) returnType(*name)
#define CK_CALLBACK_FUNCTION(returnType, name) returnType(*name)
#define NULL_PTR 0
#include "pkcs11.h"

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST ours;

static void count(const char *line) {
	char path[4096];
	snprintf(path, sizeof path, "%s/calls", getenv("COUNT_DIR"));
	int fd = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
	char text[64];
	int n = snprintf(text, sizeof text, "%s\n", line);
	if (fd < 0 || write(fd, text, n) != n)
		abort();
	close(fd);
}

static CK_RV ordered(const char *name) {
	char path[4096], mine[4200], text[32] = "";
	snprintf(path, sizeof path, "%s/%s.rv", getenv("COUNT_DIR"), name);
	snprintf(mine, sizeof mine, "%s.%d", path, getpid());
	if (rename(path, mine) != 0) // of several processes one has it
		return CKR_OK;
	int fd = open(mine, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
		abort();
	close(fd);
	unlink(mine);
	if (strcmp(text, "crash") == 0)
		raise(SIGSEGV);
	while (strcmp(text, "hang") == 0)
		pause();
	snprintf(mine, sizeof mine, "%s/%s.go", getenv("COUNT_DIR"), name);
	while (strcmp(text, "wait") == 0 && access(mine, F_OK) != 0)
		usleep(1000);
	return strtoul(text, NULL, 0); // of a word 0
}

static CK_RV openSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, CK_SESSION_HANDLE_PTR sh) {
	count(flags & CKF_RW_SESSION ? "C_OpenSession rw" : "C_OpenSession ro");
	CK_RV rv = ordered("OpenSession");
	return rv ? rv : real->C_OpenSession(slot, flags, app, notify, sh);
}

static CK_RV login(CK_SESSION_HANDLE sh, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG n) {
	count("C_Login");
	CK_RV rv = ordered("Login");
	return rv ? rv : real->C_Login(sh, user, pin, n);
}

static CK_RV sign(CK_SESSION_HANDLE sh, CK_BYTE_PTR data, CK_ULONG n, CK_BYTE_PTR sig, CK_ULONG_PTR m) {
	char path[4096];
	snprintf(path, sizeof path, "%s/deadly", getenv("COUNT_DIR"));
	FILE *f = fopen(path, "r");
	if (f) {
		char what[64];
		size_t k = fread(what, 1, sizeof what, f);
		fclose(f);
		if (k > n || memcmp(what, data, k) != 0)
			goto alive;
		count("deadly");
		raise(SIGSEGV);
	}
alive:;
	if (getenv("COUNT_SIGNS")) {
		char line[64];
		snprintf(line, sizeof line, "C_Sign %02x", n ? data[0] : 0);
		count(line);
	}
	CK_RV rv = ordered("Sign");
	if (rv == CKR_USER_NOT_LOGGED_IN) // and that is so
		real->C_Logout(sh);
	return rv ? rv : real->C_Sign(sh, data, n, sig, m);
}

static CK_RV generateRandom(CK_SESSION_HANDLE sh, CK_BYTE_PTR data, CK_ULONG n) {
	count("C_GenerateRandom");
	CK_RV rv = ordered("GenerateRandom");
	return rv ? rv : real->C_GenerateRandom(sh, data, n);
}

static CK_RV generate(CK_SESSION_HANDLE sh, CK_MECHANISM_PTR mech, CK_ATTRIBUTE_PTR pub, CK_ULONG npub,
	CK_ATTRIBUTE_PTR priv, CK_ULONG npriv, CK_OBJECT_HANDLE_PTR a, CK_OBJECT_HANDLE_PTR b) {
	CK_RV rv = real->C_GenerateKeyPair(sh, mech, pub, npub, priv, npriv, a, b);
	CK_RV late = ordered("GenerateKeyPair"); // failed, but persisted
	return late ? late : rv;
}

static CK_RV createObject(CK_SESSION_HANDLE sh, CK_ATTRIBUTE_PTR t, CK_ULONG n, CK_OBJECT_HANDLE_PTR h) {
	count("C_CreateObject");
	CK_RV rv = real->C_CreateObject(sh, t, n, h);
	CK_RV late = ordered("CreateObject"); // failed, but persisted
	return late ? late : rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list) {
	if (real == NULL) {
		void *so = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
		CK_C_GetFunctionList get = so ? (CK_C_GetFunctionList)dlsym(so, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != CKR_OK)
			return CKR_GENERAL_ERROR;
		ours = *real;
		ours.C_OpenSession = openSession;
		ours.C_Login = login;
		ours.C_Sign = sign;
		ours.C_GenerateRandom = generateRandom;
		ours.C_GenerateKeyPair = generate;
		ours.C_CreateObject = createObject;
	}
	*list = &ours;
	return CKR_OK;
}
