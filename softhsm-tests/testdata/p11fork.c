/* Signs with a PKCS#11 module before a fork, in the child and in the parent after it, for the tests of softhsm-tests.
 *
 * Usage: p11fork MODULE KEY-LABEL
 *
 * It prints what each step gave: the name of the step and the CK_RV in hexadecimal. */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <p11-kit/pkcs11.h>

static CK_FUNCTION_LIST *p;
static CK_SESSION_HANDLE session;
static CK_OBJECT_HANDLE key;

static CK_RV initialize(void)
{
	CK_C_INITIALIZE_ARGS args;

	memset(&args, 0, sizeof args);
	args.flags = CKF_OS_LOCKING_OK;
	return p->C_Initialize(&args);
}

static CK_RV find(char *label)
{
	CK_OBJECT_CLASS class = CKO_PRIVATE_KEY;
	CK_ATTRIBUTE template[] = {
		{ CKA_CLASS, &class, sizeof class },
		{ CKA_LABEL, label, strlen(label) },
	};
	CK_SLOT_ID slots[8];
	CK_ULONG n = 8;
	CK_RV rv;

	rv = p->C_GetSlotList(CK_TRUE, slots, &n);
	if (rv == CKR_OK && n > 0)
		rv = p->C_OpenSession(slots[0], CKF_SERIAL_SESSION, NULL, NULL, &session);
	if (rv == CKR_OK)
		rv = p->C_FindObjectsInit(session, template, 2);
	if (rv == CKR_OK)
		rv = p->C_FindObjects(session, &key, 1, &n);
	if (rv == CKR_OK)
		rv = p->C_FindObjectsFinal(session);
	return rv == CKR_OK && n != 1 ? CKR_GENERAL_ERROR : rv;
}

static CK_RV sign(void)
{
	CK_MECHANISM mechanism = { CKM_SHA256_RSA_PKCS, NULL, 0 };
	unsigned char sig[1024];
	CK_ULONG n = sizeof sig;
	CK_RV rv;

	rv = p->C_SignInit(session, &mechanism, key);
	if (rv == CKR_OK)
		rv = p->C_Sign(session, (unsigned char *)"text", 4, sig, &n);
	return rv == CKR_OK && n != 256 ? CKR_GENERAL_ERROR : rv;
}

static void say(const char *step, CK_RV rv)
{
	printf("%s 0x%lx\n", step, rv);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	CK_RV (*list)(CK_FUNCTION_LIST **);
	void *module;
	pid_t child;
	int status;

	if (argc != 3 || (module = dlopen(argv[1], RTLD_NOW)) == NULL)
		return 2;
	list = (CK_RV (*)(CK_FUNCTION_LIST **))dlsym(module, "C_GetFunctionList");
	if (list == NULL || list(&p) != CKR_OK)
		return 2;
	say("initialize", initialize());
	say("find", find(argv[2]));
	say("sign", sign());
	child = fork();
	if (child < 0)
		return 2;
	if (child == 0) {
		say("child-sign", sign());
		say("child-initialize", initialize());
		say("child-find", find(argv[2]));
		say("child-sign-again", sign());
		_exit(0); /* without C_Finalize */
	}
	if (waitpid(child, &status, 0) != child || status != 0)
		return 2;
	say("parent-sign", sign());
	return 0;
}
